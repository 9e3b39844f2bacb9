"""One paper, one file, in folders by what it is for."""
