// A lane's share of a key and of a value, in loads: LANES lanes hold one between them.

#define KEY_PIECES (KEY_DIM / (LANES * KEY_VECTOR))
#define VALUE_PIECES (VALUE_DIM / (LANES * VALUE_VECTOR))
