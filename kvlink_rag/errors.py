"""Errors and warnings. Each message says what was wrong, with which value, and what to do."""


class KVLinkError(Exception):
    """Base of every error that kvlink_rag raises on purpose."""


class InputError(KVLinkError, ValueError):
    """An argument, a chunk or a setting cannot be used."""


class UnsupportedModelError(KVLinkError, ValueError):
    """The model's attention or positions do not allow exact chunk reuse."""


class ModelNotFoundError(KVLinkError):
    """A model is neither on disk nor to be fetched."""


class AdapterRequiredError(KVLinkError):
    """A strategy needs trained link tokens and the engine has no adapter."""


class AdapterError(KVLinkError):
    """An adapter is missing, damaged, or was trained for another model."""


class StoreError(KVLinkError):
    """A store cannot be opened, read or written."""


class IndexMismatchError(KVLinkError):
    """An index was made with other settings (model, embeddings) than it is opened with."""


class KVLinkWarning(UserWarning):
    """Something went wrong that was repaired or worked around, answers stay right."""
