"""Presets: adapters for published models whose checkpoints hold all that was trained.

`kvlink5-llama` is for KVLink's own models with five link tokens a chunk (arXiv 2502.16002),
`Shiyu-Lab/Llama1B-KVLink5` and `Shiyu-Lab/Llama3B-KVLink5`; its README names none with no or one
link token. Its own scripts take the tokenizer of `meta-llama/Llama-3.2-1B-Instruct`: where a
checkpoint has none beside it, give the engine a ``(model, tokenizer)`` pair. An untuned Llama 3.2
has the same vocabulary and cannot be told from them. Sources are files of
github.com/UCSB-NLP-Chang/KVLink:

- `titan_trainer_kvlink.py`: link tokens are Llama 3.2's reserved tokens from id 128011 on, 128254
  opens the chunks and 128255 closes them.
- `src/data/titan_preprocessor.py`, `process_qamem`: begin of text, a system turn (one of four
  wordings, drawn at random), 128254, each chunk with its link tokens, 128255, one more end of turn,
  the user's turn with the bare question. `process_qa`, the same for full prefill, has none of these
  tokens. System turns hold no dates, which the chat template of Llama 3.2 would put there.
- `make_segment_mask` there: a chunk sees nothing but itself.
- `src/training/titan_trainer_config_utils.py`: link tokens are made for 40 chunks.

Two things differ. Chunks there begin with ``Document [rank](Title: ...)``; a rank is not known
before retrieval, so it is left out. The system prompt is worded anew. (The evaluation scripts
there, `scripts/evaluation`, put the chunks into the user's turn, right before the question:
:data:`kvlink_rag.CHUNKS` in a message does the same.)
"""

from __future__ import annotations

from kvlink_rag.adapters.adapter import Adapter
from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.prompt.layout import PromptTemplate

_LLAMA3_CHAT = (
    "<|begin_of_text|>"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{- message.content or '' }}{{ '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif -%}"
)

_KVLINK_PROMPT = PromptTemplate(
    before="<|eot_id|>",  # in training the system turn ends twice: before the chunks and behind
    question="{question}",
    options={"chat_template": _LLAMA3_CHAT},
    chunk="Document (Title: {title}) {text}\n",
    system=(
        "You are an AI assistant. Answer truthfully and to the point. If there are documents, rely "
        "on them alone, and say so when they do not hold the answer."
    ),
    turn="system",
)

PRESETS = {
    "kvlink5-llama": Adapter(
        kind="whole-model",
        links=LinkTokens(layout="slot", count=5, first_id=128011, slots=40),
        encode_behind="alone",
        prompt=_KVLINK_PROMPT,
        around=((128254,), (128255,)),
        notes={"models": ["Shiyu-Lab/Llama1B-KVLink5", "Shiyu-Lab/Llama3B-KVLink5"]},
        name="kvlink5-llama",
    )
}
"""By the name that ``adapter=`` takes."""
