"""A trained model in use: loading, sampling, evaluating, the playground, serving."""
