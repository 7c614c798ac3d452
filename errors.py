"""What can go wrong, one exception a process exit code.

Every message is one or two lines: what is wrong, where, and what to do. `cli.py` prints it and exits with
`exit_code`; anything that is not a `GsaeError` is a fault of ours and exits with 1.
"""


class GsaeError(Exception):
    """Base of every error that is told to the user in one line."""

    exit_code = 1


class UsageError(GsaeError):
    """A setting or argument that cannot work."""

    exit_code = 2


class NotFoundError(GsaeError):
    """A model, text, store, site or file that is not there."""

    exit_code = 3


class CorruptError(GsaeError):
    """Bytes that are not what the manifest, a checksum or the format promises."""

    exit_code = 4


class IncompatibleError(GsaeError):
    """Two good things that do not belong together: another digest, a changed setting, a newer format."""

    exit_code = 5


class SpaceError(GsaeError):
    """No room on the disk or in memory."""

    exit_code = 6


class RemoteError(GsaeError):
    """An object store that does not answer, or not any more; the same command goes on when it does."""

    exit_code = 75


class InterruptedRun(BaseException):
    """The run stopped cleanly on a signal; the same command goes on from here.

    Like KeyboardInterrupt no `Exception`, so that nothing which guards against a library's failures takes it for one.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
