#pragma once

// The calling thread's last error, as monarch_last_error() reports it.

void         monarch_error_set(const char * error) noexcept;
const char * monarch_error_get();
