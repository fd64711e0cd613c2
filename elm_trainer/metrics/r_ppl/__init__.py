"""The metric module `r_ppl`."""
