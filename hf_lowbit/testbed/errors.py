"""What goes wrong while fetching."""


class FetchError(RuntimeError):
    """A model or data set could not be fetched; the message says from where and why."""
