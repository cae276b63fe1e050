"""Sources of images: folders, tables, named sets, and sets with masks or boxes."""
