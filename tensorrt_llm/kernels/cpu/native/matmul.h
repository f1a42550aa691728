// Rows of x times rows of a weight that is stored as floats, int8 or int4; see matmul.c and int4.c.
#pragma once
#include <stddef.h>

struct weight {
    const void *rows;    // [n, groups, padded] in the format of the product
    const float *scale;  // [n, groups], NULL for floats
    const float *zero;   // the same; what is taken off each stored integer, or NULL: nothing, 8 from int4
};

struct product {
    int format;           // of the weight
    size_t tokens, n;     // rows of x, rows of the weight
    size_t groups;        // of columns with one scale each; 1 for floats
    size_t columns;       // of a group
    size_t padded;        // the same, rounded up to 64: what lies beyond `columns` in a weight must be finite
    const void *x;        // [tokens, groups * columns]
    int x_format;
    struct weight weight;
    struct weight gate;   // rows NULL: no gate
    const float *bias;    // [n] or NULL
    void *y;              // [tokens, n]: x weight^T + bias, with a gate silu(x weight^T) * (x gate^T)
    int y_format;
};

// 0, or -1 without memory.
int multiply(const struct product *product);

// The same for int4, whose nibbles are q + 8, the even column of two in the low one.
int multiply_int4(const struct product *product);
