"""The plotly figures of a study."""
