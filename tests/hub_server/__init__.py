"""A small Hub on loopback for the tests: the real client speaks to it through `HF_ENDPOINT`."""
