"""Check what a wheel holds: ``python .github/check_wheel.py WHEEL``. Needs the standard library alone."""

import sys
import zipfile

PACKAGES = {"fastsae", "fastsae_kernels"}


def problems(wheel: str) -> list[str]:
    """What is wrong with the wheel's content, a sentence each; nothing, if it is right."""
    names = zipfile.ZipFile(wheel).namelist()
    found = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    wrong = [f"{name} does not belong in the wheel" for name in sorted(found - PACKAGES)]
    wrong += [f"{name} is missing" for name in sorted(PACKAGES - found)]
    needed = [
        f"{package}/{file}" for package in sorted(PACKAGES) for file in ("__init__.py", "py.typed")
    ]
    wrong += [f"{name} is missing" for name in needed if name not in names]
    points = [n for n in names if n.endswith(".dist-info/entry_points.txt")]
    if not points:
        wrong.append("there is no console script")
    return wrong


if __name__ == "__main__":
    wrong = problems(sys.argv[1])
    print("\n".join(wrong) or f"{sys.argv[1]}: {' and '.join(sorted(PACKAGES))}")  # noqa: T201
    raise SystemExit(bool(wrong))
