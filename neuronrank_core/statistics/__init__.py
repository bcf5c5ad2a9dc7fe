"""Statistics of a layer's neurons: the table; TF, DF and IDF; topics."""
