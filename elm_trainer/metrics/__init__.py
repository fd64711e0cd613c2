"""Metric modules for `evaluate`: `evaluate.load(str(files("elm_trainer.metrics") / "pmi_accuracy"))`, or `"r_ppl"`."""
