"""The errors a user can cause and mend. Each message says what was wrong, what was expected, what to do."""


class FastsaeError(Exception):
    """Anything wrong outside fastsae's own code; the command line prints it without a traceback."""

    told: bool | None = None
    """Of a run of several processes: whether another one has said what is wrong."""


class ConfigError(FastsaeError, ValueError):
    """A setting has an impossible value."""


class StreamError(FastsaeError, RuntimeError):
    """The model, the data set or the text cannot be had, or gives no usable activations; or training diverged."""


class CheckpointError(FastsaeError, RuntimeError):
    """A run cannot be saved, or a saved one cannot be continued."""


class FormatError(FastsaeError, ValueError):
    """A saved SAE cannot be read, or cannot be written in the format asked for."""


class PeerLostError(FastsaeError, RuntimeError):
    """Another process of the run has ended or hangs, so this one cannot go on."""


class Interrupted(Exception):
    """A signal ended the run; everything was saved. The text says how to go on."""

    told: bool | None = None
    """As FastsaeError's."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number
