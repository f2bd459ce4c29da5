"""Does the code do what the record says? Black-box tests on a site's real code, with made-up users, at no cost."""
