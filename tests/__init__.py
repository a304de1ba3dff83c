"""A regular package: another one called `tests`, which torch-fidelity installs, would hide a namespace package."""
