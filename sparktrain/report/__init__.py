"""What a run looks like: pictures, and a page that holds them."""
