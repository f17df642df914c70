"""How the models are trained: settings, tasks, data and the loop."""
