"""Training experiments: data, models, settings, the loop, and plots. `python -m bregman_cuda train` runs them."""
