#undef NAME
#undef VW
#undef R1
#undef R2
#undef R4
#undef R8
#undef DOT
#undef MADD
