"""A trained model in use: sampling, evaluating, the playground, serving."""
