"""Foundation models in one small repository; README.md is the tour."""
