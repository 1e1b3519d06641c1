"""The screens behind the number keys, one file each. A page is a widget, so that a wide terminal shows two of them."""
