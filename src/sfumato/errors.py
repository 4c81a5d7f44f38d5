"""The errors that a user may meet. Each message is one sentence: what was wrong, where, what would fit."""


class SfumatoError(ValueError):
    """Input that sfumato cannot use. The command line prints the message alone and exits with status 2."""


class FileError(SfumatoError):
    """A file or folder that is damaged, of another kind than asked for, or unsafe to read."""


class MismatchError(SfumatoError):
    """Readable weights that do not fit the model they were given to."""
