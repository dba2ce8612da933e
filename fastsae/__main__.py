"""``python -m fastsae`` is the command ``fastsae``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
