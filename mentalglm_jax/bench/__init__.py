"""What this machine does with a recipe, measured: ``mentalglm bench``. ``planning`` says the same beforehand."""
