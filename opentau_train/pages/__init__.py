"""Pages for a browser, one HTML file each, that load nothing: their form, drawings, charts that a script draws."""
