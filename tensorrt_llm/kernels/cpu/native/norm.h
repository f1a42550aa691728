// RMS norm of rows, with or without a residual sum before it; see norm.c.
#pragma once
#include <stddef.h>

struct norm {
    size_t tokens, hidden;
    float eps;
    const void *x;
    int x_format;
    const void *added;    // NULL: y = norm(x); else residual = x + added, y = norm(residual)
    int added_format;
    float *residual;
    const float *weight;
    void *y;
    int y_format;
};

void normalize(const struct norm *norm);
