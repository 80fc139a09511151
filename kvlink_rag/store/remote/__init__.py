"""What several machines share behind their folders: object storage, Redis.

`base` says what a remote can do; `object_store` and `redis_server` are the two ways, `open` picks
one by its URL, and `messages` keeps credentials out of what they say. `tier` puts a remote behind a
folder, by `downloads`, `uploads`, and a `guard` that leaves a remote alone that has failed.
"""
