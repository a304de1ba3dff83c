"""The search on top of the training: space, trials, report, dashboard. Run it as `python -m tune`."""
