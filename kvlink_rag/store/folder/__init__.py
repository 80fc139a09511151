"""Chunk caches in a folder: one file each, and a catalog of them.

`store` is the store itself, over `files` (chunk files and how they get their names), `catalog`
(rows, in a `database`) and `contents` (both, changed together). Beside them `settings` (what a
folder was made with), `budget` (what is evicted), `uses` (hits that wait to be counted), `check`
(verify and prune), `migrate` (another codec, in place), `outbox` (what a remote has yet to take)
and `behind` (what tiers pass on to a folder).
"""
