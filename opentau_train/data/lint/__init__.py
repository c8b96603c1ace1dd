"""What the rows and pictures of some episodes say of a source's conventions, against what is declared of them."""
