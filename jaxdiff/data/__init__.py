"""Data for training and evaluation: where examples come from and how they become batches.

- `sources`: digits, 2-D toys, the user's `.npz` file or image folder, tfds; each is a function that returns a `Source`.
- `pipeline`: shuffled, resumable training batches (grain), padded evaluation batches, the fingerprint of a run's data.
- `transforms`: pure JAX functions for the jitted step and for pictures.

Import the modules themselves; this package imports nothing, so that grain loads only where training needs it.
"""
