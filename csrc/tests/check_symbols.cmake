# Fails if OBJECT defines a weak or global symbol outside its own NAMESPACE: the linker keeps one copy of such a symbol
# for the whole module, and an AVX-512 copy of a shared inline function would crash an older processor.
execute_process(COMMAND ${NM} -C --defined-only ${OBJECT} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${NM} failed on ${OBJECT}")
endif()
string(REPLACE ";" "," symbols "${symbols}")
string(REPLACE "\n" ";" lines "${symbols}")
foreach(line IN LISTS lines)
  if(line MATCHES "^[0-9a-f]+ [A-Zuvw] " AND NOT line MATCHES "[: ]${NAMESPACE}::|kernels_${NAMESPACE}|DW\\.ref\\.")
    message(SEND_ERROR "${NAMESPACE}: ${line}")
  endif()
endforeach()
