"""Where the hashing processes put the content of large files."""


def staged_path(directory: str, number: int) -> str:
    """Return where the staged file `number` of one hashing process is."""
    return f"{directory}/{number}"
