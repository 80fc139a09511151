"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ModelDtype = Annotated[
    Dtype, typer.Option(help="Of the model and its caches; auto: the checkpoint's.")
]
Behind = Literal["documents", "system", "header", "alone"]
"""As ``kvlink_rag.prompt.layout.EncodeBehind``, without loading what that needs."""
RemoteURL = Annotated[
    str | None,
    typer.Option(
        envvar="KVLINK_REMOTE",
        help="What several machines share behind the index' folder, such as s3://bucket/kv.",
    ),
]
