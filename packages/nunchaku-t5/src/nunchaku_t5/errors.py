"""What goes wrong with files."""


class CheckpointError(ValueError):
    """A file or folder is not what it should be; the message names it, what was expected and what was found."""


def shown(text: object) -> str:
    """A name out of a file, short and printable, for an error message."""
    plain = str(text).encode("ascii", "backslashreplace").decode()
    return repr(plain if len(plain) <= 120 else plain[:117] + "...")
