"""Make the texts of an erasure from what a user has: documents, facts, or a mere name."""
