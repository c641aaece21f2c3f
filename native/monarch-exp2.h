#pragma once

// e^x = 2^(x*MONARCH_LOG2_E)
#define MONARCH_LOG2_E 1.44269504f

// 2^x on [0, 1) as a polynomial, least-maximum in relative error: below 1e-6

#define MONARCH_EXP2_0 9.999999251e-01f
#define MONARCH_EXP2_1 6.931530731e-01f
#define MONARCH_EXP2_2 2.401536175e-01f
#define MONARCH_EXP2_3 5.582631658e-02f
#define MONARCH_EXP2_4 8.989341848e-03f
#define MONARCH_EXP2_5 1.877575949e-03f
