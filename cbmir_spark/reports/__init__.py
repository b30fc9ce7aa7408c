"""HTML pages and figures. Pure: rows and arrays in, pages and PNGs out."""
