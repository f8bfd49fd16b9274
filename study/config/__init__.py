"""What a study is: validated models, how they are read from presets, files and `--set`."""
