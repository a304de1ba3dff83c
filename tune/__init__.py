"""The hyperparameter search: space, trials, report and dashboard. Run it with `python -m tune`."""
