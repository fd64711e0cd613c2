"""Texts, facts and question banks, and how they become batches."""
