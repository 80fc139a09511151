"""Documents that were made up for chunks to be encoded behind.

A chunk that is encoded with no document before it is read as the beginning of a text, and every
chunk of a prompt then claims the attention that a model pays to a beginning. Behind a few
documents, whatever they are about, its keys and values are nearer to those that it has in the
middle of a prompt (docs/accuracy.md has how much). They are part of no prompt, cost no question
anything, and say nothing about anybody. To change a word is to make all caches behind them anew.
"""

from __future__ import annotations

from kvlink_rag.chunk import Chunk

PREAMBLE = (
    Chunk(
        "A rope ferry crosses a river along a cable that is fixed on both banks. The current "
        "itself pushes the boat, so that it needs no engine. Many were replaced by bridges in the "
        "twentieth century; some still run in summer and carry walkers, bicycles and a few cars "
        "at a time.",
        title="Rope ferries",
    ),
    Chunk(
        "Sourdough bread rises by wild yeast and bacteria that live in a mixture of flour and "
        "water. Bakers keep some of it back for the next loaf. The acids that form give the bread "
        "its taste, and let it keep for about a week.",
        title="Sourdough",
    ),
    Chunk(
        "The library was built in 1911 with money left by Clara Whitlock, a printer's widow. It "
        "held four thousand volumes when it opened and holds sixty thousand today. Its reading "
        "room was restored after a fire in 1978, and since 2004 it has been open on Sundays.",
        title="The town library of Arden",
    ),
    Chunk(
        "A lichen is a fungus and an alga that live as one. It grows on bark, on stone and on "
        "roofs, often less than a millimetre a year, and some are thought to be thousands of "
        "years old. Because they take what they need from rain and air, lichens show how clean "
        "the air of a place is.",
        title="Lichens",
    ),
    Chunk(
        "A pilot goes on board a ship before it enters a harbour and tells the captain how to "
        "steer. Pilots know the shallows, the tides and the traffic of their own port. They come "
        "in small fast boats, and climb up a ladder at the ship's side, in any weather.",
        title="Harbour pilots",
    ),
    Chunk(
        "The club was founded by railway workers in 1899 and played its first matches on a meadow "
        "by the station. It won the county cup in 1926 and again in 1953, under the trainer Henry "
        "Oakes. Its colours are green and white.",
        title="Marlow United",
    ),
)
