# placeholder so that the tree builds; replaced in the next commit
