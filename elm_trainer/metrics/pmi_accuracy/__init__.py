"""The metric module `pmi_accuracy`."""
