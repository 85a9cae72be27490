"""How the package's extras are installed, for errors that ask for one."""


def how_to_install(extra: str) -> str:
    """Return the end of a sentence that says what is missing.

    It installs from a clone: on the package index the name belongs to another project.
    """
    return f'install the extra {extra} from a clone of Penstock: pip install ".[{extra}]"'
