"""How a model is judged, and the files and tables that say so."""
