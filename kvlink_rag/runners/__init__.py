"""Who runs a model: :mod:`base` says what every one can do, the folders beside it do it."""
