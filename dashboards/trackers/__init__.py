"""Other programs' experiment trackers: a study replayed into TensorBoard, MLflow or Weights & Biases."""
