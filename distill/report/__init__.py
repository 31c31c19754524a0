"""One HTML page that shows what runs learnt, made from the files of their run directories; imports no torch."""
