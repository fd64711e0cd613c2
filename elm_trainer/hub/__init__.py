"""Publishing erased adapters with their evidence, and loading them."""
