"""Erasure methods: one file each, over the shared `ErasureTrainer`."""
